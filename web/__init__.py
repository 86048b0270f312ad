"""The page of `chat.py --web`: talk, compare, vote. Only page.py knows gradio."""
