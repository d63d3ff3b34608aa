output "url" {
  description = "The server that takes writes, with the password."
  value       = "rediss://:${random_password.this.result}@${aws_elasticache_replication_group.this.primary_endpoint_address}:6379/0"
  sensitive   = true
}

output "id" {
  description = "The replication group, for alarms."
  value       = aws_elasticache_replication_group.this.id
}
