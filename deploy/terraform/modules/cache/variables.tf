variable "name" {
  description = "Prefix of every name."
  type        = string
}

variable "node_type" {
  description = "Of both nodes."
  type        = string
}

variable "vpc_id" {
  description = "The network."
  type        = string
}

variable "subnet_ids" {
  description = "Where the nodes are."
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
