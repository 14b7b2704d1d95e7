"""The control plane: what operators read and change, over HTTP on a listener of its own.

`guard` stands before everything: it tells who asks, holds back who asks too much, and bounds bodies. Each other room serves one
kind of thing; `app` puts them together. A fault here is logged and answered 500 in the usual form; it never reaches a check.
Any number of requests may run at once: changes take turns in the catalog.
"""
