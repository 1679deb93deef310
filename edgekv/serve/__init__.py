"""The HTTP face of a service: the OpenAI API, a page to look at, metrics. What computes and schedules is in the runtime."""
