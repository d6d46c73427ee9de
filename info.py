#
# CSCI3290 Computational Imaging and Vision *
# --- Declaration --- *
# I declare that the assignment here submitted is original except for source
# material explicitly acknowledged. I also acknowledge that I am aware of
# University policy and regulations on honesty in academic work, and of the
# disciplinary guidelines and procedures applicable to breaches of such policy
# and regulations, as contained in the website
# http://www.cuhk.edu.hk/policy/academichonesty/ *
# Assignment 4
# Name:
# Student ID:
# Email Addr:
#
"""Name, id and email of the author. Fill them in before training, since they are saved in each checkpoint."""

from dataclasses import dataclass


@dataclass
class Info:
    name: str
    id: str
    email: str


info = Info(name="your name", id="1155xxxxxx", email="example@example.com")
