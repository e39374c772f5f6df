"""In: model requests and responses of pydantic-ai. Out: whether to stream them, and what facts state of them."""
