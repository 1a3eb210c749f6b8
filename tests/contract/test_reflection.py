"""What a client that knows nothing finds out about a router: its services, their messages, and whether it is well."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from pdspec.config import RouterConfig
from router.service import launch

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def channel():
    router = launch(RouterConfig(port=0, model="tiny"))
    with grpc.insecure_channel(router.address) as opened:
        yield opened
    router.stop()


def test_reflection_lists_the_services_and_describes_their_messages(channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    services = set(database.get_services())
    assert {"pdspec.v1.Router", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= services
    pool = DescriptorPool(database)
    router = pool.FindServiceByName("pdspec.v1.Router")
    assert [method.name for method in router.methods] == ["Generate", "ListWorkers"]
    asked = pool.FindMessageTypeByName("pdspec.v1.GenerateRequest")
    assert {"text", "chat", "prompt_ids", "sampling"} <= set(asked.fields_by_name)


def test_health_tells_the_server_from_the_deployment(channel):
    """The process is well at once; the Router service only while a decode worker is ready."""
    health = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == SERVING
    asked = health_pb2.HealthCheckRequest(service="pdspec.v1.Router")
    assert health.Check(asked, timeout=5).status == NOT_SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="pdspec.v1.Nothing"), timeout=5)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
