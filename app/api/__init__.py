"""The HTTP edge: what a request must look like, who sent it, and how answers and errors are written."""
