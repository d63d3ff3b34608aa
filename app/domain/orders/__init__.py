"""Orders: placing them, the saga that follows, invoices and confirmation mails."""
