"""One URL from public hosts: which addresses are allowed, bounded requests, rates and robots.txt."""
