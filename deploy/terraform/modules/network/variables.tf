variable "name" {
  description = "Prefix of every name."
  type        = string
}

variable "cidr" {
  description = "Addresses of the network; a /16 has room for every tier."
  type        = string
  default     = "10.20.0.0/16"
}

variable "prometheus_group" {
  description = "Security group of Prometheus, or null."
  type        = string
  default     = null
}

variable "zones" {
  description = "Three zones of the region. Named, as a zone that AWS adds must not move anything."
  type        = list(string)

  validation {
    condition     = length(var.zones) == 3
    error_message = "zones: name three."
  }
}
