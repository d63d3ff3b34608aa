variable "name" {
  description = "Prefix of every name."
  type        = string
}

variable "eviction" {
  description = "What goes when it is full: noeviction (writes are refused) or allkeys-lru."
  type        = string

  validation {
    condition     = contains(["noeviction", "allkeys-lru"], var.eviction)
    error_message = "eviction: noeviction or allkeys-lru."
  }
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
