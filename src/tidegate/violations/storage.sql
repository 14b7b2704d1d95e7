-- Violations: adding them, and the upkeep of their table. What stands in braces are names and numbers that the caller makes
-- itself: DDL takes no parameters.

-- name: add_postgresql
-- All rows in one parameter: 500 rows cost the loop 2 ms, and 10 ms as 500 sets of parameters.
INSERT INTO rate_limit_violations AS held (minute_us, tier, rule, subject, blocked)
SELECT CAST(part ->> 0 AS bigint), part ->> 1, part ->> 2, part ->> 3, CAST(part ->> 4 AS bigint)
FROM json_array_elements(CAST(:parts AS json)) AS part
ON CONFLICT (minute_us, tier, rule, subject) DO UPDATE SET blocked = held.blocked + excluded.blocked

-- name: add_sqlite
-- WHERE true: without it, ON would begin the condition of a join.
INSERT INTO rate_limit_violations AS held (minute_us, tier, rule, subject, blocked)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'), json_extract(value, '$[3]'),
    json_extract(value, '$[4]')
FROM json_each(:parts) WHERE true
ON CONFLICT (minute_us, tier, rule, subject) DO UPDATE SET blocked = held.blocked + excluded.blocked

-- name: clock
-- µs since the epoch. An instance whose own clock is wrong would drop days that are to be kept.
SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)

-- name: turn
SELECT pg_try_advisory_xact_lock(:lock)

-- name: patience
-- Whoever waits for a table makes all who come later wait as well: better to give up and try again later.
SET LOCAL lock_timeout = '1s'

-- name: partitions
SELECT child.relname
FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
WHERE inhparent = CAST('rate_limit_violations' AS regclass)

-- name: in_default
-- How many rows of a day the default partition holds, counted up to :most.
SELECT count(*)
FROM (SELECT 1 FROM rate_limit_violations_default WHERE minute_us >= :from_us AND minute_us < :to_us LIMIT :most) AS held

-- name: hold_parent
-- Attaching takes this lock on the parent. It is taken first, as writers and readers take the parent first.
LOCK TABLE ONLY rate_limit_violations IN SHARE UPDATE EXCLUSIVE MODE

-- name: hold_default
-- Without it, a row that is written between moving and attaching would make attaching fail.
LOCK TABLE rate_limit_violations_default IN ACCESS EXCLUSIVE MODE

-- name: make
-- Made beside the parent and attached, not as PARTITION OF, which locks all readers and writers of the parent out.
CREATE TABLE {partition} (LIKE rate_limit_violations INCLUDING ALL)

-- name: move
WITH moved AS (
    DELETE FROM rate_limit_violations_default WHERE minute_us >= :from_us AND minute_us < :to_us RETURNING *
)
INSERT INTO {partition} SELECT * FROM moved

-- name: attach
ALTER TABLE rate_limit_violations ATTACH PARTITION {partition} FOR VALUES FROM ({from_us}) TO ({to_us})

-- name: drop
DROP TABLE {partition}

-- name: delete_postgresql
DELETE FROM rate_limit_violations_default
WHERE ctid = ANY (ARRAY(SELECT ctid FROM rate_limit_violations_default WHERE minute_us < :before_us LIMIT :most))

-- name: delete_sqlite
DELETE FROM rate_limit_violations
WHERE rowid IN (SELECT rowid FROM rate_limit_violations WHERE minute_us < :before_us LIMIT :most)
