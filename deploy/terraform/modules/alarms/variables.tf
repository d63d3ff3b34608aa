variable "name" {
  description = "Prefix of every name."
  type        = string
}

variable "email" {
  description = "Who is told."
  type        = string
}

variable "key_arn" {
  description = "KMS key of the topic."
  type        = string
}

variable "balancer" {
  description = "The balancer as metrics name it."
  type        = string
}

variable "target_group" {
  description = "Its target group."
  type        = string
}

variable "database_ids" {
  description = "All database servers."
  type        = list(string)
}

variable "replica_ids" {
  description = "The read replicas."
  type        = list(string)
}

variable "redis_group" {
  description = "The Redis that evicts nothing."
  type        = string
}

variable "api_group" {
  description = "The API machines' group."
  type        = string
}

variable "scale_up_policy_arn" {
  description = "What high CPU does."
  type        = string
}
