"""Reflection, as grpcurl and Postman ask for it: v1 first, v1alpha if that is not there."""

from __future__ import annotations

import grpc.aio
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2

from baton import reflection
from baton.server import GrpcServer
from baton.v1 import router_pb2, router_pb2_grpc

ROUTER = "baton.v1.Router"


@pytest.mark.parametrize("name", reflection.SERVICE_NAMES)
async def test_services_and_their_files_are_found_under_both_names(name: str) -> None:
    server = GrpcServer()
    server.add(router_pb2_grpc.add_RouterServicer_to_server, router_pb2_grpc.RouterServicer(), ROUTER)
    address = server.bind("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            ask = channel.stream_stream(
                f"/{name}/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            symbols = [ROUTER, "grpc.health.v1.Health", *reflection.SERVICE_NAMES]
            requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
            requests += [reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol) for symbol in symbols]
            call = ask(iter(requests), timeout=10)
            listed, *files = [response async for response in call]
    finally:
        await server.stop(0)
    assert {service.name for service in listed.list_services_response.service} == set(symbols)
    for symbol, response in zip(symbols, files, strict=True):
        found = [
            descriptor_pb2.FileDescriptorProto.FromString(content)
            for content in response.file_descriptor_response.file_descriptor_proto
        ]
        services = {f"{file.package}.{service.name}" for file in found for service in file.service}
        assert symbol in services
    assert router_pb2.DESCRIPTOR.services_by_name["Router"].full_name == ROUTER
