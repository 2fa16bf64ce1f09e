package spireapi

import (
	"maps"
	"slices"
)

// CheckCSR is the border of foreign certificate requests, for fuzzing.
func CheckCSR(der []byte) error {
	_, err := parseCSR(der)
	return err
}

// Heard are the agents of which s knows what they did last.
func Heard(s *Server) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.seen))
}
