output "group_name" {
  description = "The Auto Scaling group."
  value       = aws_autoscaling_group.this.name
}

output "scale_up_policy_arn" {
  description = "What the high-CPU alarm does."
  value       = aws_autoscaling_policy.scale_up.arn
}

output "balancer_dns" {
  description = "Address of the balancer, for role api."
  value       = one(aws_lb.this[*].dns_name)
}

output "balancer_suffix" {
  description = "The balancer as metrics name it."
  value       = one(aws_lb.this[*].arn_suffix)
}

output "target_group_suffix" {
  description = "The target group as metrics name it."
  value       = one(aws_lb_target_group.this[*].arn_suffix)
}
