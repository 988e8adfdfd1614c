"""A web page over steering.v1: one image without steering and with it, side by side. python -m service.playground"""
