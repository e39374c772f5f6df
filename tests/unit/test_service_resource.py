"""The service's resource in its facts: from the standard variables by an allow list, and from the settings."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

import agx
from agx.config import describe_service
from agx.facts.schema import Service

ENVIRONMENT = (
    "service.name=shop, service.version=1,deployment.environment.name=staging%20eu,k8s.pod.name=p-1,"
    "service.instance.id=i,host.ip=10.0.0.7,broken,openinference.project.name=chat"
)


def config_of(**settings: object) -> agx.Config:
    return agx.Config(redis=Redis(), **settings)  # type: ignore[arg-type] # also wrong ones


def test_only_allowed_attributes_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", ENVIRONMENT)
    passed = {
        "deployment.environment.name": "staging eu",
        "k8s.pod.name": "p-1",
        "openinference.project.name": "chat",
    }
    assert describe_service(config_of()) == Service("shop", "1", "i", tuple(passed.items()))


def test_settings_add_to_them_and_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", ENVIRONMENT)
    given = {"team": "x" * 500, "k8s.pod.name": "mine"}
    attributes = dict(describe_service(config_of(resource_attributes=given)).attributes)
    assert attributes["team"] == "x" * 200
    assert attributes["k8s.pod.name"] == "mine"
    many = {f"k{n}": "v" for n in range(100)}
    assert len(describe_service(config_of(resource_attributes=many)).attributes) == 32


@pytest.mark.parametrize("odd", [{"team": 7}, {3: "x"}, {"team": None}])
def test_anything_but_texts_is_refused(odd: dict[object, object]) -> None:
    with pytest.raises(TypeError, match="texts only"):
        config_of(resource_attributes=odd)
