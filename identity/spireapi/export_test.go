package spireapi

// CheckCSR is the border of foreign certificate requests, for fuzzing.
func CheckCSR(der []byte) error {
	_, err := parseCSR(der)
	return err
}
