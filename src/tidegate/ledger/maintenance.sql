-- Maintenance of the ledger's tables: minutes become hours, callers with few units are merged, old rows are deleted.

-- name: oldest_minute
SELECT min(minute_us) FROM traffic_minutes WHERE minute_us < :before_us

-- name: rules_postgresql
-- One statement: what another process adds to a minute meanwhile is either moved or stays.
WITH moved AS (
    DELETE FROM traffic_minutes WHERE minute_us >= :from_us AND minute_us < :to_us RETURNING tier, rule, allowed, blocked, over_limit
)
INSERT INTO traffic_hours AS stored (hour_us, tier, rule, allowed, blocked, over_limit)
SELECT CAST(:from_us AS bigint), tier, rule, sum(allowed), sum(blocked), sum(over_limit) FROM moved GROUP BY tier, rule
ON CONFLICT (hour_us, tier, rule) DO UPDATE SET
    allowed = stored.allowed + excluded.allowed, blocked = stored.blocked + excluded.blocked,
    over_limit = stored.over_limit + excluded.over_limit

-- name: rules_sqlite
-- The first statement locks the database for the transaction.
INSERT INTO traffic_hours AS stored (hour_us, tier, rule, allowed, blocked, over_limit)
SELECT :from_us, tier, rule, sum(allowed), sum(blocked), sum(over_limit) FROM traffic_minutes
WHERE minute_us >= :from_us AND minute_us < :to_us GROUP BY tier, rule
ON CONFLICT (hour_us, tier, rule) DO UPDATE SET
    allowed = stored.allowed + excluded.allowed, blocked = stored.blocked + excluded.blocked,
    over_limit = stored.over_limit + excluded.over_limit

-- name: delete_minutes
DELETE FROM traffic_minutes WHERE minute_us >= :from_us AND minute_us < :to_us

-- name: oldest_latency
SELECT min(at_us) FROM traffic_latency WHERE step_s = 60 AND at_us < :before_us

-- name: latency_postgresql
WITH moved AS (
    DELETE FROM traffic_latency WHERE step_s = 60 AND at_us >= :from_us AND at_us < :to_us RETURNING bucket, checks
)
INSERT INTO traffic_latency AS stored (step_s, at_us, bucket, checks)
SELECT 3600, CAST(:from_us AS bigint), bucket, sum(checks) FROM moved GROUP BY bucket
ON CONFLICT (step_s, at_us, bucket) DO UPDATE SET checks = stored.checks + excluded.checks

-- name: latency_sqlite
INSERT INTO traffic_latency AS stored (step_s, at_us, bucket, checks)
SELECT 3600, :from_us, bucket, sum(checks) FROM traffic_latency
WHERE step_s = 60 AND at_us >= :from_us AND at_us < :to_us GROUP BY bucket
ON CONFLICT (step_s, at_us, bucket) DO UPDATE SET checks = stored.checks + excluded.checks

-- name: delete_latency
DELETE FROM traffic_latency WHERE step_s = 60 AND at_us >= :from_us AND at_us < :to_us

-- name: crowded_hours
SELECT hour_us FROM traffic_callers WHERE hour_us >= :from_us AND hour_us < :to_us AND subject <> ''
GROUP BY hour_us HAVING count(*) > :max_callers

-- name: merge_callers_postgresql
WITH named AS (
    SELECT tier, rule, subject, row_number() OVER (ORDER BY allowed + blocked DESC, tier, rule, subject) AS place
    FROM traffic_callers WHERE hour_us = :hour_us AND subject <> ''
), removed AS (
    DELETE FROM traffic_callers AS stored USING named
    WHERE stored.hour_us = :hour_us AND stored.tier = named.tier AND stored.rule = named.rule AND stored.subject = named.subject
        AND named.place > :max_callers
    RETURNING stored.tier, stored.rule, stored.allowed, stored.blocked, stored.over_limit
)
INSERT INTO traffic_callers AS stored (hour_us, tier, rule, subject, allowed, blocked, over_limit)
SELECT CAST(:hour_us AS bigint), tier, rule, '', sum(allowed), sum(blocked), sum(over_limit) FROM removed GROUP BY tier, rule
ON CONFLICT (hour_us, tier, rule, subject) DO UPDATE SET
    allowed = stored.allowed + excluded.allowed, blocked = stored.blocked + excluded.blocked,
    over_limit = stored.over_limit + excluded.over_limit

-- name: merge_callers_sqlite
INSERT INTO traffic_callers AS stored (hour_us, tier, rule, subject, allowed, blocked, over_limit)
SELECT :hour_us, tier, rule, '', sum(allowed), sum(blocked), sum(over_limit) FROM traffic_callers
WHERE hour_us = :hour_us AND subject <> '' AND rowid NOT IN (
    SELECT rowid FROM traffic_callers WHERE hour_us = :hour_us AND subject <> ''
    ORDER BY allowed + blocked DESC, tier, rule, subject LIMIT :max_callers
)
GROUP BY tier, rule
ON CONFLICT (hour_us, tier, rule, subject) DO UPDATE SET
    allowed = stored.allowed + excluded.allowed, blocked = stored.blocked + excluded.blocked,
    over_limit = stored.over_limit + excluded.over_limit

-- name: delete_callers
DELETE FROM traffic_callers WHERE hour_us = :hour_us AND subject <> '' AND rowid NOT IN (
    SELECT rowid FROM traffic_callers WHERE hour_us = :hour_us AND subject <> ''
    ORDER BY allowed + blocked DESC, tier, rule, subject LIMIT :max_callers
)

-- name: old_hours_postgresql
DELETE FROM traffic_hours WHERE ctid = ANY (ARRAY(SELECT ctid FROM traffic_hours WHERE hour_us < :before_us LIMIT :max_rows))

-- name: old_hours_sqlite
DELETE FROM traffic_hours WHERE rowid IN (SELECT rowid FROM traffic_hours WHERE hour_us < :before_us LIMIT :max_rows)

-- name: old_latency_postgresql
DELETE FROM traffic_latency
WHERE ctid = ANY (ARRAY(SELECT ctid FROM traffic_latency WHERE at_us < :before_us LIMIT :max_rows))

-- name: old_latency_sqlite
DELETE FROM traffic_latency WHERE rowid IN (SELECT rowid FROM traffic_latency WHERE at_us < :before_us LIMIT :max_rows)

-- name: old_batches
DELETE FROM ledger_batches WHERE written_at_us < :before_us
