"""What is made of measurements for people: warnings of slow links, and traces of requests."""
