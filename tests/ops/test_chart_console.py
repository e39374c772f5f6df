"""The console in the chart: its settings, its token, its routes, and the network policies of both kinds of pod."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
from ops.chart import SECRETS, environment_of, one, render, switched

from agx_sidecar.settings import read_settings

CONSOLE = "agx-agx-sidecar-console"


def test_the_console_only_shows_and_never_counts() -> None:
    secret = "a-secret-with-a-long-name"
    proxies = ["10.0.0.0/8", "2001:db8::1"]
    console = {"console": {"enabled": True, "mode": "read", "existingSecret": secret, "trustedProxies": proxies}}
    settings = read_settings(environment_of(console, "agx-agx-sidecar-console")[0])
    assert settings.sinks == frozenset()
    assert settings.console is not None
    assert (settings.console.can_write, settings.console.shows_content) == (False, False)
    assert (settings.console.host, settings.console.port) == ("0.0.0.0", 9465)
    assert settings.console.trusted_proxies == ("10.0.0.0/8", "2001:db8::1/128")
    full = {"console": SECRETS["console"] | {"existingSecret": secret}}
    settings = read_settings(environment_of(full, "agx-agx-sidecar-console")[0])
    assert settings.console is not None
    assert (settings.console.can_write, settings.console.shows_content) == (True, True)


def test_the_console_keeps_a_random_token_unless_given_one() -> None:
    console = switched(True, "console.enabled")
    first, second = (one(render(console), "Secret", "agx-agx-sidecar-console")["data"]["token"] for _ in range(2))
    assert len(first) > 40
    assert first != second
    assert not [m for m in render(SECRETS) if m["kind"] == "Secret"]


ROUTES: dict[str, Any] = {
    "enabled": True,
    "port": 9000,
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "annotations": {"a": "b"},
        "hosts": ["console.example.org", "console.example.com"],
        "path": "/agents",
        "tls": [{"secretName": "tls", "hosts": ["console.example.org"]}],
    },
    "httpRoute": {
        "enabled": True,
        "annotations": {"c": "d"},
        "parentRefs": [{"name": "public", "namespace": "gateways"}],
        "hostnames": ["console.example.org"],
    },
}


def test_an_ingress_and_a_route_lead_to_the_consoles_service() -> None:
    manifests = render({"console": ROUTES})
    (port,) = one(manifests, "Service", CONSOLE)["spec"]["ports"]
    ingress = one(manifests, "Ingress", CONSOLE)
    kubernetes_validate.validate(ingress, "1.37", strict=True)
    assert ingress["metadata"]["annotations"] == {"a": "b"}
    assert ingress["spec"]["ingressClassName"] == "nginx"
    assert ingress["spec"]["tls"] == ROUTES["ingress"]["tls"]
    assert [rule["host"] for rule in ingress["spec"]["rules"]] == ROUTES["ingress"]["hosts"]
    for rule in ingress["spec"]["rules"]:
        (path,) = rule["http"]["paths"]
        assert path["path"] == "/agents"
        assert path["backend"]["service"] == {"name": CONSOLE, "port": {"name": port["name"]}}
    route = one(manifests, "HTTPRoute", CONSOLE)
    assert route["metadata"]["annotations"] == {"c": "d"}
    assert route["spec"]["parentRefs"] == ROUTES["httpRoute"]["parentRefs"]
    assert route["spec"]["hostnames"] == ["console.example.org"]
    ((backend,),) = [rule["backendRefs"] for rule in route["spec"]["rules"]]
    assert backend == {"name": CONSOLE, "port": port["port"]}


def test_no_route_without_a_console() -> None:
    kinds = {manifest["kind"] for manifest in render({"console": ROUTES | {"enabled": False}})}
    assert not kinds & {"Ingress", "HTTPRoute"}


def _policies(values: dict[str, Any]) -> dict[str, Any]:
    return {m["metadata"]["name"]: m["spec"] for m in render(values) if m["kind"] == "NetworkPolicy"}


def test_the_sidecar_and_the_console_have_their_own_network_policies() -> None:
    scraper, browser = {"podSelector": {"matchLabels": {"app": "prometheus"}}}, {"podSelector": {}}
    egress = [{"to": [{"podSelector": {}}]}]
    policy = {"enabled": True, "ingressFrom": [scraper], "consoleIngressFrom": [browser], "egress": egress}
    policies = _policies({"networkPolicy": policy, "console": {"enabled": True}})
    assert set(policies) == {"agx-agx-sidecar", CONSOLE}
    for name, port, peer in (("agx-agx-sidecar", "http", scraper), (CONSOLE, "console", browser)):
        spec = policies[name]
        assert spec["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == (
            "console" if name == CONSOLE else "sidecar"
        )
        assert spec["ingress"] == [{"ports": [{"port": port, "protocol": "TCP"}], "from": [peer]}]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        assert spec["egress"][1:] == egress


def test_the_console_has_its_network_policy_without_the_deployment_too() -> None:
    values = switched(True, "networkPolicy.enabled", "console.enabled") | switched(False, "deployment.enabled")
    assert set(_policies(values)) == {CONSOLE}
    assert set(_policies(switched(True, "networkPolicy.enabled"))) == {"agx-agx-sidecar"}
