output "url" {
  description = "The primary, with the password."
  value       = "${local.chosen.scheme}://scaleout:${random_password.owner.result}@${aws_db_instance.primary.endpoint}/scaleout"
  sensitive   = true
}

output "replica_urls" {
  description = "The replicas, with the password."
  value       = [for replica in aws_db_instance.replica : "${local.chosen.scheme}://scaleout:${random_password.owner.result}@${replica.endpoint}/scaleout"]
  sensitive   = true
}

output "ids" {
  description = "All servers, for alarms."
  value       = concat([aws_db_instance.primary.identifier], aws_db_instance.replica[*].identifier)
}

output "replica_ids" {
  description = "The replicas, for alarms."
  value       = aws_db_instance.replica[*].identifier
}
