variable "name" {
  description = "Prefix of every name."
  type        = string
}

variable "engine" {
  description = "postgres or mysql."
  type        = string
}

variable "instance_class" {
  description = "Of primary and replicas: a replica must keep up with the primary's writes, so it is as large."
  type        = string
}

variable "replicas" {
  description = "How many read replicas."
  type        = number
}

variable "vpc_id" {
  description = "The network."
  type        = string
}

variable "subnet_ids" {
  description = "Where the servers are."
  type        = list(string)
}

variable "client_group" {
  description = "Security group of whoever may connect."
  type        = string
}

variable "key_arn" {
  description = "KMS key of everything at rest."
  type        = string
}
