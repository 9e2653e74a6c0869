"""The server: OpenAI's interface over HTTP, made by `create_app` of an engine in a thread of its own."""
