"""Which nodes are there and what each request gets. Pure: no asyncio, grpc or protobuf."""
