-- Writing violations. The maintenance of their table is in `tidegate.catalog.sql.partitions`.

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
