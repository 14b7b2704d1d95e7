-- Maintenance of tables with one partition per period of time. Names and numbers in braces are inserted by the caller and never come
-- from clients: DDL has no parameters.

-- name: clock
-- µs since the epoch. With its own clock, an instance whose clock is wrong would drop periods too early.
SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)

-- name: advisory_lock
SELECT pg_try_advisory_xact_lock(:lock)

-- name: lock_timeout
-- A statement that waits for a table blocks all later ones: better to fail and retry later.
SET LOCAL lock_timeout = '1s'

-- name: partitions
SELECT child.relname
FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
WHERE inhparent = CAST('{table}' AS regclass)

-- name: in_default
-- The number of rows of a period in the default partition, counted up to :max_rows.
SELECT count(*)
FROM (SELECT 1 FROM {table}_default WHERE {column} >= :from_us AND {column} < :to_us LIMIT :max_rows) AS stored

-- name: lock_parent
-- ATTACH PARTITION needs this lock on the parent. It is acquired first, because writers and readers lock the parent first.
LOCK TABLE ONLY {table} IN SHARE UPDATE EXCLUSIVE MODE

-- name: lock_default
-- Otherwise a row written between `move` and `attach` would make `attach` fail.
LOCK TABLE {table}_default IN ACCESS EXCLUSIVE MODE

-- name: create
-- A separate table, attached later: CREATE TABLE ... PARTITION OF blocks all readers and writers of the parent.
CREATE TABLE {partition} (LIKE {table} INCLUDING ALL)

-- name: move
WITH moved AS (
    DELETE FROM {table}_default WHERE {column} >= :from_us AND {column} < :to_us RETURNING *
)
INSERT INTO {partition} SELECT * FROM moved

-- name: attach
ALTER TABLE {table} ATTACH PARTITION {partition} FOR VALUES FROM ({from_us}) TO ({to_us})

-- name: drop
DROP TABLE {partition}

-- name: delete_postgresql
DELETE FROM {table}_default
WHERE ctid = ANY (ARRAY(SELECT ctid FROM {table}_default WHERE {column} < :before_us LIMIT :max_rows))

-- name: delete_sqlite
DELETE FROM {table}
WHERE rowid IN (SELECT rowid FROM {table} WHERE {column} < :before_us LIMIT :max_rows)
