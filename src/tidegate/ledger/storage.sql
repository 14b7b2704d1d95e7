-- Batches of the usage ledger and the traffic history. All rows of a table come in one parameter: 500 rows cost the loop 2 ms, and
-- 10 ms as 500 sets of parameters.

-- name: claim
-- Returns a row if this batch was not applied before. It locks the row of the instance, so that a repeated batch waits until the
-- transaction of the first attempt has ended.
INSERT INTO ledger_batches AS stored (instance, sequence, written_at_us) VALUES (:instance, :sequence, :at_us)
ON CONFLICT (instance) DO UPDATE SET sequence = excluded.sequence, written_at_us = excluded.written_at_us
WHERE stored.sequence < excluded.sequence
RETURNING sequence

-- name: ledger_postgresql
INSERT INTO usage_ledger AS stored (day_us, customer, key_id, tier, rule, admitted, blocked, over_limit)
SELECT CAST(part ->> 0 AS bigint), part ->> 1, part ->> 2, part ->> 3, part ->> 4,
    CAST(part ->> 5 AS bigint), CAST(part ->> 6 AS bigint), CAST(part ->> 7 AS bigint)
FROM json_array_elements(CAST(:parts AS json)) AS part
ON CONFLICT (day_us, customer, key_id, tier, rule) DO UPDATE SET
    admitted = stored.admitted + excluded.admitted, blocked = stored.blocked + excluded.blocked,
    over_limit = stored.over_limit + excluded.over_limit

-- name: ledger_sqlite
-- WHERE true: without it, ON would begin the condition of a join.
INSERT INTO usage_ledger AS stored (day_us, customer, key_id, tier, rule, admitted, blocked, over_limit)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'), json_extract(value, '$[3]'),
    json_extract(value, '$[4]'), json_extract(value, '$[5]'), json_extract(value, '$[6]'), json_extract(value, '$[7]')
FROM json_each(:parts) WHERE true
ON CONFLICT (day_us, customer, key_id, tier, rule) DO UPDATE SET
    admitted = stored.admitted + excluded.admitted, blocked = stored.blocked + excluded.blocked,
    over_limit = stored.over_limit + excluded.over_limit

-- name: rules_postgresql
INSERT INTO traffic_minutes AS stored (minute_us, tier, rule, allowed, blocked, over_limit)
SELECT CAST(part ->> 0 AS bigint), part ->> 1, part ->> 2,
    CAST(part ->> 3 AS bigint), CAST(part ->> 4 AS bigint), CAST(part ->> 5 AS bigint)
FROM json_array_elements(CAST(:parts AS json)) AS part
ON CONFLICT (minute_us, tier, rule) DO UPDATE SET
    allowed = stored.allowed + excluded.allowed, blocked = stored.blocked + excluded.blocked,
    over_limit = stored.over_limit + excluded.over_limit

-- name: rules_sqlite
INSERT INTO traffic_minutes AS stored (minute_us, tier, rule, allowed, blocked, over_limit)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'), json_extract(value, '$[3]'),
    json_extract(value, '$[4]'), json_extract(value, '$[5]')
FROM json_each(:parts) WHERE true
ON CONFLICT (minute_us, tier, rule) DO UPDATE SET
    allowed = stored.allowed + excluded.allowed, blocked = stored.blocked + excluded.blocked,
    over_limit = stored.over_limit + excluded.over_limit

-- name: callers_postgresql
INSERT INTO traffic_callers AS stored (hour_us, tier, rule, subject, allowed, blocked, over_limit)
SELECT CAST(part ->> 0 AS bigint), part ->> 1, part ->> 2, part ->> 3,
    CAST(part ->> 4 AS bigint), CAST(part ->> 5 AS bigint), CAST(part ->> 6 AS bigint)
FROM json_array_elements(CAST(:parts AS json)) AS part
ON CONFLICT (hour_us, tier, rule, subject) DO UPDATE SET
    allowed = stored.allowed + excluded.allowed, blocked = stored.blocked + excluded.blocked,
    over_limit = stored.over_limit + excluded.over_limit

-- name: callers_sqlite
INSERT INTO traffic_callers AS stored (hour_us, tier, rule, subject, allowed, blocked, over_limit)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'), json_extract(value, '$[3]'),
    json_extract(value, '$[4]'), json_extract(value, '$[5]'), json_extract(value, '$[6]')
FROM json_each(:parts) WHERE true
ON CONFLICT (hour_us, tier, rule, subject) DO UPDATE SET
    allowed = stored.allowed + excluded.allowed, blocked = stored.blocked + excluded.blocked,
    over_limit = stored.over_limit + excluded.over_limit

-- name: latency_postgresql
INSERT INTO traffic_latency AS stored (step_s, at_us, bucket, checks)
SELECT 60, CAST(part ->> 0 AS bigint), CAST(part ->> 1 AS integer), CAST(part ->> 2 AS bigint)
FROM json_array_elements(CAST(:parts AS json)) AS part
ON CONFLICT (step_s, at_us, bucket) DO UPDATE SET checks = stored.checks + excluded.checks

-- name: latency_sqlite
INSERT INTO traffic_latency AS stored (step_s, at_us, bucket, checks)
SELECT 60, json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]')
FROM json_each(:parts) WHERE true
ON CONFLICT (step_s, at_us, bucket) DO UPDATE SET checks = stored.checks + excluded.checks
