"""The page of a run: one HTML file that opens from disk and asks the network for nothing."""

from .page import html as html
