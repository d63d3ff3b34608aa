"""The business: who the customers are, what is for sale, what was ordered and what became of it."""
