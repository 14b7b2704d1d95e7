-- For the monitor, once it runs. Mends https://github.com/hapostgres/pg_auto_failover/issues/1060, which the versions of Debian 12 and 13 have:
-- a primary that was silent, and comes back while it is being replaced, may be told to fetch what it lacks from the most advanced node, find that it
-- is that node itself, and try for ever. Here a node that fetches is none to fetch from. Later versions have the same in a function of another
-- signature: then this changes nothing.
DO $mend$
BEGIN
    IF to_regprocedure('pgautofailover.get_most_advanced_standby(text, int)') IS NULL THEN
        RAISE NOTICE 'this version of pg_auto_failover needs no mending';
        RETURN;
    END IF;
    CREATE OR REPLACE FUNCTION pgautofailover.get_most_advanced_standby(
        IN formationid text DEFAULT 'default',
        IN groupid int DEFAULT 0,
        OUT node_id bigint,
        OUT node_name text,
        OUT node_host text,
        OUT node_port int,
        OUT node_lsn pg_lsn,
        OUT node_is_primary bool
    )
    RETURNS SETOF record LANGUAGE sql STRICT
    AS $most_advanced$
        SELECT n.nodeid, n.nodename, n.nodehost, n.nodeport, n.reportedlsn, false
        FROM pgautofailover.node AS n
        WHERE n.formationid = $1 AND n.groupid = $2 AND n.reportedstate = 'report_lsn' AND n.goalstate <> 'fast_forward'
        ORDER BY n.reportedlsn DESC, n.health DESC
        LIMIT 1
    $most_advanced$;
END
$mend$;
