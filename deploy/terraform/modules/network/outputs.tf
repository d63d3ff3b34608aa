output "vpc_id" {
  description = "The network."
  value       = aws_vpc.this.id
}

output "cidr" {
  description = "Its addresses."
  value       = var.cidr
}

output "public_subnet_ids" {
  description = "For the balancer."
  value       = aws_subnet.public[*].id
}

output "service_subnet_ids" {
  description = "For machines."
  value       = aws_subnet.service[*].id
}

output "data_subnet_ids" {
  description = "For databases and Redis."
  value       = aws_subnet.data[*].id
}

output "balancer_group_id" {
  description = "Security group of the balancer."
  value       = aws_security_group.balancer.id
}

output "service_group_id" {
  description = "Security group of the machines."
  value       = aws_security_group.service.id
}
