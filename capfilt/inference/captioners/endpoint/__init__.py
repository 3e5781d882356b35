"""The captioner's role, played by a server that speaks the protocol of OpenAI: vLLM, SGLang, `transformers serve`."""
