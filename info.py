"""Who trains: fill this in, it is saved into every checkpoint."""

from dataclasses import dataclass


@dataclass
class Info:
    name: str
    id: str
    email: str


info = Info(name="your name", id="1155xxxxxx", email="example@example.com")
