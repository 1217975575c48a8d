"""Files in ComfyUI's folders."""
