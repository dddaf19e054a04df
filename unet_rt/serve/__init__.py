"""The service: engines behind HTTP, with a page. One process answers, others compute, and one queue lies between them."""
