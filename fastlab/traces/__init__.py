"""`fastlab trace`: what recorded training steps spend their time on, and what to try next."""
