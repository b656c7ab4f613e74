"""Hugging Face models: load, attach, convert, close and open layers, explain, restore."""
