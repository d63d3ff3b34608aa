"""The catalog: products, warehouses and the stock in them. It lives in the catalog database, not on the shards."""
