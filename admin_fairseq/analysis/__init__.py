"""The paper's analyses as a tool: ``admin-fairseq analyze`` measures any fairseq Transformer, and draws."""
