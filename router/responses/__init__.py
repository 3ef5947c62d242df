"""OpenAI's Responses API: bodies to requests, answers and events in its form, and the responses that are kept."""
