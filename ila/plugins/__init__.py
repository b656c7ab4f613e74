"""Our layers inside other tools: a callback for tools that take callbacks, a plugin for axolotl."""
