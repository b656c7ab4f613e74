"""The frozen part below the lowest open layer: computed once, kept on disk."""
