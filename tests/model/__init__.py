"""What the model test is made of: virtual time, failures at the two ports, and the truth that answers are held against."""
