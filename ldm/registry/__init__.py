"""A model's way: registered, judged by the gate, champion, served."""
