//go:build tools

// Package tools keeps the program in go.mod: tidy would drop what nothing imports.
package tools

import _ "github.com/cloudnativelabs/kube-router/v2/cmd/kube-router"
