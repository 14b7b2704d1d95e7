-- Writing violations, and the maintenance of their table. Names and numbers in braces are inserted by the caller and never come from
-- clients: DDL has no parameters.

-- name: add_postgresql
-- All rows in one parameter: 500 rows cost the loop 2 ms, and 10 ms as 500 sets of parameters.
INSERT INTO rate_limit_violations AS stored (minute_us, tier, rule, subject, blocked)
SELECT CAST(part ->> 0 AS bigint), part ->> 1, part ->> 2, part ->> 3, CAST(part ->> 4 AS bigint)
FROM json_array_elements(CAST(:parts AS json)) AS part
ON CONFLICT (minute_us, tier, rule, subject) DO UPDATE SET blocked = stored.blocked + excluded.blocked

-- name: add_sqlite
-- WHERE true: without it, ON would begin the condition of a join.
INSERT INTO rate_limit_violations AS stored (minute_us, tier, rule, subject, blocked)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'), json_extract(value, '$[3]'),
    json_extract(value, '$[4]')
FROM json_each(:parts) WHERE true
ON CONFLICT (minute_us, tier, rule, subject) DO UPDATE SET blocked = stored.blocked + excluded.blocked

-- name: clock
-- µs since the epoch. With its own clock, an instance whose clock is wrong would drop days too early.
SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)

-- name: advisory_lock
SELECT pg_try_advisory_xact_lock(:lock)

-- name: lock_timeout
-- A statement that waits for a table blocks all later ones: better to fail and retry later.
SET LOCAL lock_timeout = '1s'

-- name: partitions
SELECT child.relname
FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
WHERE inhparent = CAST('rate_limit_violations' AS regclass)

-- name: in_default
-- The number of rows of a day in the default partition, counted up to :max_rows.
SELECT count(*)
FROM (SELECT 1 FROM rate_limit_violations_default WHERE minute_us >= :from_us AND minute_us < :to_us LIMIT :max_rows) AS stored

-- name: lock_parent
-- ATTACH PARTITION needs this lock on the parent. It is acquired first, because writers and readers lock the parent first.
LOCK TABLE ONLY rate_limit_violations IN SHARE UPDATE EXCLUSIVE MODE

-- name: lock_default
-- Otherwise a row written between `move` and `attach` would make `attach` fail.
LOCK TABLE rate_limit_violations_default IN ACCESS EXCLUSIVE MODE

-- name: create
-- A separate table, attached later: CREATE TABLE ... PARTITION OF blocks all readers and writers of the parent.
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
WHERE ctid = ANY (ARRAY(SELECT ctid FROM rate_limit_violations_default WHERE minute_us < :before_us LIMIT :max_rows))

-- name: delete_sqlite
DELETE FROM rate_limit_violations
WHERE rowid IN (SELECT rowid FROM rate_limit_violations WHERE minute_us < :before_us LIMIT :max_rows)
