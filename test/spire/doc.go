// Package spire holds unmodified SPIRE programs against hansed: spire-agent as its node agent, the spire-server CLI as its
// administrator. It is a module of its own, so that SPIRE's dependencies stay out of Hanse's. `make test-spire` runs it.
package spire
