"""What the tests share: real counterparts of agx (an OTLP receiver, a model over HTTP) and how to wait for a fact."""
