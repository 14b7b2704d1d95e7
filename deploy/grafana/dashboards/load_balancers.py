"""Load balancers in front: HAProxy from its own endpoint, nginx from its exporter."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.layout import Row, choice, dashboard
from dashboards.panels import GREEN, RED, Panel, Query, Steps, lines, number, states, up
from dashboards.promql import rate, total

_HAPROXY = 'instance=~"$haproxy"'
_NGINX = 'instance=~"$nginx"'


def made() -> Dashboard:
    """Make the dashboard.

    Returns:
        It.
    """
    return dashboard(
        "load_balancers",
        "Tidegate: load balancers",
        "Do requests arrive, do they find a server, and what do they get?",
        [Row("All", _all()), Row("HAProxy", _haproxy()), Row("nginx", _nginx())],
        [
            choice("haproxy", "HAProxy", "label_values(haproxy_process_uptime_seconds, instance)"),
            choice("nginx", "nginx", "label_values(nginx_up, instance)"),
        ],
    )


def _rate(metric: str, by: str, labels: str = _HAPROXY) -> str:
    return rate(metric, labels, by)


def _all() -> list[list[Panel]]:
    return [
        [
            number(
                "Balancers down",
                "A HAProxy or nginx, or its exporter, does not respond.",
                "short",
                Query('count(up{job=~"haproxy|nginx"} == 0 or nginx_up == 0) or vector(0)'),
                "servicedown",
                Steps(None, 1),
            ),
            number(
                "Servers down",
                "Servers that HAProxy's health checks find down. Red: other servers take over their load.",
                "short",
                Query('sum(haproxy_server_status{state="DOWN"}) or vector(0)'),
                "instancedown",
                Steps(None, 1),
            ),
            number(
                "Fewest servers",
                "Of the back end with the fewest. 0: its requests get 503.",
                "short",
                Query("min(haproxy_backend_active_servers) or vector(0)"),
                "noinstanceup",
                Steps(2, 1, low_is_bad=True),
            ),
            number(
                "Requests",
                "Per second, all HAProxies and nginxes.",
                "reqps",
                Query(
                    "(sum(rate(haproxy_frontend_http_requests_total[$__rate_interval])) or vector(0))"
                    " + (sum(rate(nginx_http_requests_total[$__rate_interval])) or vector(0))"
                ),
                "noinstanceup",
            ),
            number(
                "HAProxy's 5xx",
                "Share of its responses, including 503 responses of Tidegate: see the objectives.",
                "percentunit",
                Query(
                    'sum(rate(haproxy_frontend_http_responses_total{code="5xx"}[$__rate_interval]))'
                    " / (sum(rate(haproxy_frontend_http_responses_total[$__rate_interval])) > 0) or vector(0)"
                ),
                "availabilitybudgetburn",
                Steps(0.0001, 0.001),
            ),
        ]
    ]


def _haproxy() -> list[list[Panel]]:
    return [
        [
            lines(
                "Requests",
                "A second, by front end.",
                "reqps",
                Query(_rate("haproxy_frontend_http_requests_total", "proxy"), "{{proxy}}"),
                see="noinstanceup",
            ),
            lines(
                "Responses by code",
                "Per second. 4xx includes 429 for blocked checks that HAProxy forwards. For 5xx see the panels below.",
                "reqps",
                Query(_rate("haproxy_frontend_http_responses_total", "code"), "{{code}}"),
                see="availabilitybudgetburn",
                colours={"2xx": GREEN, "5xx": RED},
            ),
            states(
                "Servers",
                "Results of each HAProxy's health checks.",
                Query(f'min by (proxy, server) (haproxy_server_status{{{_HAPROXY}, state="UP"}})', "{{proxy}} {{server}}"),
                {1: ("up", GREEN), 0: ("not up", RED)},
                see="instancedown",
            ),
        ],
        [
            lines(
                "Responses by server",
                "Per second. Uneven: one is new, slow, or was down.",
                "reqps",
                Query(_rate("haproxy_server_http_responses_total", "server"), "{{server}}"),
                see="instancedown",
            ),
            lines(
                "Failures by server",
                "Per second: failed health checks, failed connections, aborted responses.",
                "ops",
                Query(_rate("haproxy_server_check_failures_total", "server"), "checks, {{server}}"),
                Query(_rate("haproxy_server_connection_errors_total", "server"), "connections, {{server}}"),
                Query(_rate("haproxy_server_response_errors_total", "server"), "answers, {{server}}"),
                see="instancedown",
            ),
            lines(
                "Time of a response",
                "Mean of the last 1,024 requests, by server, including the check.",
                "s",
                Query(f"max by (server) (haproxy_server_response_time_average_seconds{{{_HAPROXY}}})", "{{server}}"),
                see="highlatency",
            ),
        ],
        [
            lines(
                "Sessions",
                "Open, by front end. At its `maxconn` new ones wait.",
                "short",
                Query(total("haproxy_frontend_current_sessions", _HAPROXY, "proxy"), "{{proxy}}"),
                see="noinstanceup",
            ),
            lines(
                "Queue",
                "Requests that wait for a server, by back end. Above 0 for long: too few instances.",
                "short",
                Query(total("haproxy_backend_current_queue", _HAPROXY, "proxy"), "{{proxy}}"),
                see="highlatency",
            ),
            lines(
                "Retries",
                "Per second: retried, and redispatched to another server, by back end.",
                "ops",
                Query(_rate("haproxy_backend_retry_warnings_total", "proxy"), "again, {{proxy}}"),
                Query(_rate("haproxy_backend_redispatch_warnings_total", "proxy"), "elsewhere, {{proxy}}"),
                see="instancedown",
            ),
            lines(
                "Denied by HAProxy",
                "Requests per second that its own rules refuse, by front end.",
                "reqps",
                Query(_rate("haproxy_frontend_requests_denied_total", "proxy"), "{{proxy}}"),
                see="suspiciousactivity",
            ),
        ],
    ]


def _nginx() -> list[list[Panel]]:
    return [
        [
            lines(
                "Requests",
                "Per second, by nginx, including its requests to Tidegate.",
                "reqps",
                Query(_rate("nginx_http_requests_total", "instance", _NGINX), "{{instance}}"),
                see="servicedown",
            ),
            lines(
                "Connections",
                "By state, all nginxes. If Writing grows: slow back ends, or clients that read slowly.",
                "short",
                Query(total("nginx_connections_reading", _NGINX), "reading"),
                Query(total("nginx_connections_writing", _NGINX), "writing"),
                Query(total("nginx_connections_waiting", _NGINX), "waiting"),
                see="servicedown",
                stacked=True,
            ),
            lines(
                "Dropped",
                "Connections per second that it accepted and could not handle, by nginx. Above 0: raise `worker_connections`.",
                "ops",
                Query(
                    f"{_rate('nginx_connections_accepted', 'instance', _NGINX)}"
                    f" - {_rate('nginx_connections_handled', 'instance', _NGINX)}",
                    "{{instance}}",
                ),
                see="servicedown",
            ),
            up("nginx", "nginx_up", _NGINX, "servicedown"),
        ]
    ]
