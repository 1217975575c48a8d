"""Files below ComfyUI's folders."""
