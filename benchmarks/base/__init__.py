"""A base model of our own: a small Llama with multi-head attention, pretrained here."""
